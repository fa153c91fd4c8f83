"""The files beside the weights: a saved model has its base's own, edited only in what training changed.

What transformers 5 would write, transformers 4 and the programs built on it misread: a tokenizer class that they do not
know, and a config.json from which they take a rope_theta of 10,000.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoProcessor, PreTrainedConfig
from transformers.utils import cached_file

from tuning.console import print0
from tuning.errors import try_optional
from tuning.files import is_local_path
from tuning.hub import NOT_OF_THE_MODEL
from tuning.model.load import PIXELS, find_template

OF_A_PROCESSOR = (
    *("*token*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json"),
    *("*processor_config.json", "*chat_template*", "*.jinja"),
)
FOR_AN_ADAPTER = (*OF_A_PROCESSOR, "generation_config.json", "*.py")
COPIED = (*FOR_AN_ADAPTER, "*.json", "*.txt", "LICENSE*", "USE_POLICY*")
NOT_COPIED = (".*", "*.index.json", "adapter_*", "*.md", *NOT_OF_THE_MODEL)
PARTS = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
"""Part of a processor → the file with its settings. transformers 5 has them in `PROCESSOR_FILE` as well."""
PROCESSOR_FILE, TEMPLATE_FILE = "processor_config.json", "chat_template.jinja"
OTHER_TEMPLATE_FILES = ("chat_template.json", "tokenizer_config.json", PROCESSOR_FILE)
"""Where a chat template may be, too: each version has had its own place."""


@dataclass(frozen=True)
class BaseFiles:
    """What a base model has beside its weights.

    `files`: name → content, in memory, since the base may be moved while a run trains. `changes`: settings of the image
    processor that are not the base's. `processor_class`: what loads them. `processor`: saved with transformers where
    edited files cannot give it. `template`: its chat template, if that is not the base's: an engine that serves the
    base with an adapter takes this one from a file of its own.
    """

    files: Mapping[str, bytes]
    changes: Mapping[str, Any]
    processor_class: str
    processor: Any | None = None
    template: str = ""

    def write(self, target: Path, *, for_adapter: bool) -> None:
        """Write them into `target`. `for_adapter`: only what belongs to a processor."""
        for name, content in self.files.items():
            if for_adapter and not matches(name, FOR_AN_ADAPTER):
                continue
            (target / name).write_bytes(content)
        if for_adapter and not any(b'"processor_class"' in content for content in self.files.values()):
            settings = {"processor_class": self.processor_class} | read_settings(self.files.get(PROCESSOR_FILE, b"{}"))
            (target / PROCESSOR_FILE).write_bytes(to_json(settings))  # config.json, which says it, is not there
        if for_adapter and self.template:
            (target / TEMPLATE_FILE).write_text(self.template, encoding="utf-8")
        if self.processor is not None:
            self.processor.save_pretrained(target)

    def write_config(self, target: Path, config: PreTrainedConfig, dtype: str | None, *, untied: bool = False) -> None:
        """Edit config.json in `target` for weights of `dtype` (None: the base's own).

        `config`: the one in memory. `untied`: the embedding and the head have become two weights.
        """
        raw = read_settings(self.files["config.json"])
        edited = json.loads(json.dumps(raw))
        text = next((name for name in config.sub_configs if getattr(config, name) is config.get_text_config()), "")
        if dtype and (find_dtype(raw) or find_dtype(raw.get(text, {}))) != dtype:
            set_dtype(edited, dtype)
        if untied:
            edited["tie_word_embeddings"] = edited.get(text, edited)["tie_word_embeddings"] = False
        if getattr(config, "quantization_config", None) is None:
            edited.pop("quantization_config", None)  # the weights were dequantised to be trained
        edited |= {name: value for name, value in self.changes.items() if hasattr(config, name)}
        if edited != raw:
            (target / "config.json").write_bytes(to_json(edited))


def read_base_files(name: str | Path, processor: Any, *, trust_remote_code: bool = False) -> BaseFiles:
    """The files of the base model `name`, a folder or hub id, edited so that they give `processor`.

    `processor`: in memory, with the user's chat template and settings. Raises `OSError` where the base cannot be read.
    """
    folder = find_folder(name)
    files = {
        file.name: file.read_bytes()
        for file in sorted(folder.iterdir())
        if file.is_file() and matches(file.name, COPIED) and not matches(file.name, NOT_COPIED)
    }
    kind = type(processor).__name__
    published = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    template, changes = find_template(processor), changed_settings(processor, published, "image_processor")
    edits = put_template(files, template) if isinstance(template, str) else {}
    changed = template if edits and isinstance(template, str) else ""
    if isinstance(template, str) and not getattr(published, "chat_template", None):
        edits[TEMPLATE_FILE] = template.encode()  # the tokenizer alone has one: a processor does not look there
    for part, file in PARTS.items():
        edits |= put_settings(files | edits, part, file, changed_settings(processor, published, part))
    if own := changed_settings(processor, published):
        edits[PROCESSOR_FILE] = to_json(
            read_settings((files | edits).get(PROCESSOR_FILE, b"{}")) | {"processor_class": kind} | own
        )
    edited = BaseFiles(files | edits, changes, kind, template=changed)
    is_named = isinstance(template, dict)  # several templates, which lie in a folder of their own
    if is_named or (edits and not gives(edited, processor, trust_remote_code=trust_remote_code)):
        print0(f"The processor of {name} is saved as transformers writes it: its files cannot hold your settings.")
        others = {name: content for name, content in files.items() if not matches(name, OF_A_PROCESSOR)}
        return BaseFiles(others, changes, kind, processor)
    return edited


def find_folder(name: str | Path) -> Path:
    """The folder of a model: a local one, or the Hub's in the cache with all that is beside the weights."""
    local = Path(name).expanduser()
    if local.is_dir() or is_local_path(str(name)):
        return local
    attempt = try_optional(lambda: snapshot_download(str(name), allow_patterns=list(COPIED), ignore_patterns="*/*"))
    return Path(attempt.value or Path(cached_file(str(name), "config.json")).parent)


def describe_processor(processor: Any) -> dict[str, Any]:
    """What of a processor decides the inputs that it makes."""
    parts = {part: getattr(processor, part, None) for part in PARTS}
    return {
        "chat template": find_template(processor),
        "vocabulary": processor.tokenizer.get_vocab(),
        **{part.replace("_", " "): value.to_dict() for part, value in parts.items() if value is not None},
        "settings": own_settings(processor),
    }


def own_settings(processor: Any) -> dict[str, Any]:
    """The settings of a processor that none of its parts has, such as `patch_size`."""
    known = processor.to_dict()
    return {
        name: value for name, value in known.items() if is_plain(value) and name not in ("chat_template", "auto_map")
    }


def is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def changed_settings(processor: Any, published: Any, part: str = "") -> dict[str, Any]:
    """The settings of a processor, or of one of its parts, that are not the published ones, as JSON has them."""
    now, then = (
        own_settings(one) if not part else getattr(one, part).to_dict() if getattr(one, part, None) else {}
        for one in (processor, published)
    )
    return json.loads(json.dumps({name: value for name, value in now.items() if value != then.get(name)}, default=str))


def put_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """The edited texts of those of `files` that have another chat template."""
    edits = dict[str, bytes]()
    if TEMPLATE_FILE in files and files[TEMPLATE_FILE].decode() != template:
        edits[TEMPLATE_FILE] = template.encode()
    for name in OTHER_TEMPLATE_FILES:
        settings = read_settings(files.get(name, b"{}"))
        new: Any = template
        if isinstance(current := settings.get("chat_template"), list):  # named ones: training takes the default
            new = [{**one, "template": template} if one["name"] == "default" else one for one in current]
        if current is not None and current != new:
            edits[name] = to_json(settings | {"chat_template": new})
    return edits


def put_settings(files: Mapping[str, bytes], part: str, file: str, changes: Mapping[str, Any]) -> dict[str, bytes]:
    """The edited texts of those of `files` that have the settings of a part, with `changes`."""
    edits = dict[str, bytes]()
    if not changes:
        return edits
    if file in files:
        edits[file] = to_json(with_changes(read_settings(files[file]), changes))
    whole = read_settings(files.get(PROCESSOR_FILE, b"{}"))
    if part in whole:
        edits[PROCESSOR_FILE] = to_json(whole | {part: with_changes(whole[part], changes)})
    return edits


def with_changes(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    size = changes.get("size") or {}
    limits = {old: size[new] for old, new in PIXELS.items() if old in settings and new in size}
    return {**settings, **changes, **limits}


def gives(files: BaseFiles, processor: Any, *, trust_remote_code: bool) -> bool:
    """Whether a processor that is loaded from the files is the one in memory."""
    with tempfile.TemporaryDirectory() as folder:
        files.write(Path(folder), for_adapter=False)
        attempt = try_optional(lambda: AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code))
    return attempt.value is not None and describe_processor(attempt.value) == describe_processor(processor)


def find_dtype(raw: Mapping[str, Any]) -> str | None:
    """The precision that a configuration, or a part of one, names."""
    return raw.get("dtype", raw.get("torch_dtype"))


def set_dtype(raw: dict[str, Any], dtype: str) -> None:
    """Set the precision in a configuration and in those of its parts that name one."""
    parts = [part for part in raw.values() if isinstance(part, dict) and find_dtype(part)]
    if find_dtype(raw) or not parts:
        raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = dtype
    for part in parts:
        set_dtype(part, dtype)


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def read_settings(content: bytes) -> dict[str, Any]:
    return json.loads(content)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
