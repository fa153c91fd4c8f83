"""Chat templates of many families, and the texts that a model of each family has to learn from the same few rows.

The templates beside this file were written for these tests, after the published formats: which headers, blanks and end
tokens stand where, in which shape content, calls and thoughts come, what is dropped. The expected texts were written by
hand from the formats, not taken from the library.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from tiny_models import CORPUS

from tuning.demo.tokenizer import train_tokenizer

# --- the rows ---

QUESTION, OTHER_QUESTION = "What is in the picture?", "And how many are there?"
ANSWER, OTHER_ANSWER = "A red square on a white ground.", "There are three of them."
SYSTEM = "You answer in few words."
THOUGHT, OTHER_THOUGHT = "I look at the shapes first.", "I count the corners next."
WEATHER_QUESTION, WEATHER_ANSWER = "Will it rain in Paris?", "No, it stays dry for two days."
ARGUMENTS = {"city": "Paris", "days": 2}
CALL_ID = "a1b2c3d4e"  # nine letters and digits, as Mistral's templates demand
RESULT = '{"rain": "none", "degrees": 21}'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of the next days.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]


def _message(role: str, content, **keys) -> dict:
    return {"role": role, "content": content, **keys}


def _two_turns(*keys: dict) -> list[dict]:
    return [
        _message("user", QUESTION),
        _message("assistant", ANSWER, **keys[0]),
        _message("user", OTHER_QUESTION),
        _message("assistant", OTHER_ANSWER, **keys[1]),
    ]


def _agent(arguments) -> list[dict]:
    call = {"id": CALL_ID, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return [
        _message("user", WEATHER_QUESTION),
        _message("assistant", "", tool_calls=[call]),
        _message("tool", RESULT, tool_call_id=CALL_ID, name="get_weather"),
        _message("assistant", WEATHER_ANSWER),
    ]


SINGLE = [_message("user", QUESTION), _message("assistant", ANSWER)]
ROWS = {
    "single": SINGLE,
    "multi": _two_turns({}, {}),
    "system": [_message("system", SYSTEM), *SINGLE],
    "tools": _agent(json.dumps(ARGUMENTS)),
    "tools_object": _agent(ARGUMENTS),
    "reasoning": _two_turns({"reasoning_content": THOUGHT}, {"reasoning_content": OTHER_THOUGHT}),
    "image": [_message("user", [{"type": "image"}, {"type": "text", "text": QUESTION}]), SINGLE[1]],
}

# --- what is expected of a family ---

Expected = Mapping[str, Sequence[str] | None]


@dataclass(frozen=True)
class Family:
    """A chat template and the tokenizer around it.

    `expected`: for each kind of row the supervised text of each assistant turn; None where the template has no place
    for what the row has. `tokens`: special tokens. `plain_tokens`: added tokens that are ordinary words to the model.
    `stop_tokens`: the contents of `eos_token_id` in the generation config. `template`: the file, where families share
    one.
    """

    name: str
    expected: Expected
    tokens: Sequence[str]
    eos: str
    bos: str | None = None
    plain_tokens: Sequence[str] = ()
    stop_tokens: Sequence[str] = ()
    image_token: str = ""
    template_kwargs: Mapping[str, object] = field(default_factory=dict)
    template: str = ""

    def expected_of(self, kind: str) -> Sequence[str] | None:
        if kind == "image":
            return self.expected["single"] if self.image_token else None
        return self.expected["tools" if kind == "tools_object" else kind]

    @property
    def source(self) -> str:
        return (Path(__file__).parent / f"{self.template or self.name}.jinja").read_text(encoding="utf-8")

    def build_processor(self) -> SimpleNamespace:
        """What the library needs of a processor to render rows."""
        special = {self.eos, *([self.bos] if self.bos else []), *([self.image_token] if self.image_token else [])}
        return SimpleNamespace(
            tokenizer=_train(tuple(sorted({*self.tokens, *special})), tuple(self.plain_tokens), self.bos, self.eos),
            chat_template=self.source,
            image_token=self.image_token,
        )


@functools.cache
def _train(special: tuple[str, ...], plain: tuple[str, ...], bos: str | None, eos: str):
    names = {"eos_token": eos, "pad_token": eos, **({"bos_token": bos} if bos else {})}
    tokenizer = train_tokenizer(CORPUS, special_tokens=list(special), **names)
    tokenizer.add_tokens(list(plain))
    return tokenizer


def turns(end: str, last: str | None = None, *, before: str = "") -> dict[str, Sequence[str] | None]:
    """A family that ends every turn with `end`, the last one with `last`, and ignores thoughts and tools."""
    last = end if last is None else last
    one, two = [before + ANSWER + last], [before + ANSWER + end, before + OTHER_ANSWER + last]
    return {"single": one, "multi": two, "system": one, "tools": None, "reasoning": two}


# --- the families ---

ARGUMENTS_TEXT = '{"city": "Paris", "days": 2}'
JSON_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'
XML_CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
)
GLM_CALL = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
)

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
QWEN = dict(
    tokens=(*CHATML, "<|vision_start|>", "<|vision_end|>"),
    eos="<|im_end|>",
    image_token="<|image_pad|>",
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
)
QWEN_PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
GLM = dict(
    tokens=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|begin_of_image|>")
    + ("<|end_of_image|>",),
    eos="<|endoftext|>",
    stop_tokens=("<|endoftext|>", "<|user|>", "<|observation|>"),
)
IM_END = turns("<|im_end|>")
QWEN_TOOLS = [JSON_CALL + "<|im_end|>", WEATHER_ANSWER + "<|im_end|>"]
QWEN_XML_TOOLS = [XML_CALL + "<|im_end|>", WEATHER_ANSWER + "<|im_end|>"]
LAST_THOUGHT_OPENED = [  # the prompt opens the thought, and the template drops the earlier one
    ANSWER + "<|im_end|>",
    OTHER_THOUGHT + "\n</think>\n\n" + OTHER_ANSWER + "<|im_end|>",
]
COHERE_TURN = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
COHERE_TURN += ("<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>")
COHERE_ANSWER = "<|START_RESPONSE|>{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
COHERE_THOUGHT = "<|START_THINKING|>{}<|END_THINKING|>"
FINAL = "<|channel|>final<|message|>"
KIMI = ("<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|media_content|>")
DEEPSEEK_END = "<｜end▁of▁sentence｜>"

FAMILIES = [
    Family("qwen2_vl", IM_END, **QWEN),
    Family("qwen2_5_vl", IM_END, template_kwargs={"add_vision_id": True}, **QWEN),
    Family("qwen3_vl", IM_END | {"tools": QWEN_TOOLS}, plain_tokens=QWEN_PLAIN, **QWEN),
    Family(
        "qwen3_vl_thinking",
        IM_END | {"tools": QWEN_TOOLS, "reasoning": LAST_THOUGHT_OPENED},
        plain_tokens=QWEN_PLAIN,
        **QWEN,
    ),
    Family(
        "qwen3",  # the model opens its thought itself
        IM_END | {"tools": QWEN_TOOLS, "reasoning": [LAST_THOUGHT_OPENED[0], "<think>\n" + LAST_THOUGHT_OPENED[1]]},
        plain_tokens=QWEN_PLAIN,
        **QWEN,
    ),
    Family(
        "qwen3_5",
        IM_END | {"tools": QWEN_XML_TOOLS, "reasoning": LAST_THOUGHT_OPENED},
        plain_tokens=QWEN_PLAIN,
        **QWEN,
    ),
    Family(
        "qwen3_5_without_thinking",  # the prompt has an empty thought; a row's own thought differs after <think>
        IM_END | {"tools": QWEN_XML_TOOLS, "reasoning": LAST_THOUGHT_OPENED},
        plain_tokens=QWEN_PLAIN,
        template="qwen3_5",
        template_kwargs={"enable_thinking": False},
        **QWEN,
    ),
    Family(
        "nemotron_nano_v2",
        turns("\n<SPECIAL_12>"),
        tokens=("<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"),
        bos="<s>",
        eos="<SPECIAL_12>",
        plain_tokens=("<think>", "</think>"),
        image_token="<image>",
    ),
    Family(
        "nemotron_3",  # without a thought it writes <think></think>, and its prompt ends in <think> and a line break
        IM_END
        | {
            "tools": [XML_CALL + "\n<|im_end|>", WEATHER_ANSWER + "<|im_end|>"],
            "reasoning": [ANSWER + "<|im_end|>", OTHER_THOUGHT + "\n</think>\n" + OTHER_ANSWER + "<|im_end|>"],
        },
        tokens=CHATML,
        bos="<s>",
        eos="<|im_end|>",
        plain_tokens=QWEN_PLAIN,
        image_token="<image>",
    ),
    Family(
        "glm_4_5v",  # writes no end: the model stops where the next turn begins
        turns("<|user|>")
        | {
            "tools": [GLM_CALL + "<|observation|>", WEATHER_ANSWER + "<|user|>"],
            "reasoning": [ANSWER + "<|user|>", f"\n<think>{OTHER_THOUGHT}</think>\n{OTHER_ANSWER}<|user|>"],
        },
        plain_tokens=(*QWEN_PLAIN, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        image_token="<|image|>",
        **GLM,
    ),
    Family("glm_4v", turns("<|user|>", before="\n"), image_token="<|endoftext|>", **GLM),
    Family(
        "gpt_oss",
        turns("<|end|>", "<|return|>", before=FINAL)
        | {
            "tools": [
                " to=functions.get_weather<|channel|>commentary json<|message|>" + ARGUMENTS_TEXT + "<|call|>",
                FINAL + WEATHER_ANSWER + "<|return|>",
            ],
            "reasoning": [
                FINAL + ANSWER + "<|end|>",
                f"<|channel|>analysis<|message|>{OTHER_THOUGHT}<|end|><|start|>assistant{FINAL}{OTHER_ANSWER}<|return|>",
            ],
        },
        tokens=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|endoftext|>", "<|startoftext|>"),
        bos="<|startoftext|>",
        eos="<|return|>",
        stop_tokens=("<|return|>", "<|endoftext|>", "<|call|>"),
    ),
    Family(
        "phi_3",
        turns("<|end|>", "<|end|>\n<|endoftext|>"),
        tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        bos="<s>",
        eos="<|endoftext|>",
        stop_tokens=("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
    Family(
        "phi_3_5_vision",
        turns("<|end|>"),
        tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        bos="<s>",
        eos="<|endoftext|>",
        stop_tokens=("<|end|>", "<|endoftext|>"),
    ),
    Family(
        "phi_4_multimodal",
        turns("<|end|>", "<|end|><|endoftext|>"),
        tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>"),
        eos="<|endoftext|>",
        stop_tokens=("<|end|>", "<|endoftext|>"),
    ),
    Family(
        "llama_3_2_vision",
        turns("<|eot_id|>")
        | {
            "tools": [
                '{"name": "get_weather", "parameters": ' + ARGUMENTS_TEXT + "}<|eot_id|>",
                WEATHER_ANSWER + "<|eot_id|>",
            ]
        },
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>", "<|end_of_text|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        stop_tokens=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        image_token="<|image|>",
    ),
    Family(
        "llama_4",
        turns("<|eot|>")
        | {
            "tools": [
                '<|python_start|><|python_end|>{"name": "get_weather", "parameters": ' + ARGUMENTS_TEXT + "}<|eot|>",
                WEATHER_ANSWER + "<|eot|>",
            ]
        },
        tokens=("<|header_start|>", "<|header_end|>", "<|eom|>", "<|python_start|>", "<|python_end|>"),
        bos="<|begin_of_text|>",
        eos="<|eot|>",
        stop_tokens=("<|eom|>", "<|eot|>"),
        image_token="<|image|>",
    ),
    Family(
        "pixtral",
        turns("</s>")
        | {
            "tools": [
                f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {ARGUMENTS_TEXT}, "id": "{CALL_ID}"}}]</s>',
                WEATHER_ANSWER + "</s>",
            ]
        },
        tokens=("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]")
        + ("[/AVAILABLE_TOOLS]",),
        bos="<s>",
        eos="</s>",
        image_token="[IMG]",
    ),
    Family(
        "mistral_small_3",
        turns("</s>")
        | {
            "tools": [
                f"[TOOL_CALLS]get_weather[CALL_ID]{CALL_ID}[ARGS]{ARGUMENTS_TEXT}</s>",
                WEATHER_ANSWER + "</s>",
            ]
        },
        tokens=("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]")
        + ("[/AVAILABLE_TOOLS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[CALL_ID]", "[ARGS]"),
        bos="<s>",
        eos="</s>",
        image_token="[IMG]",
    ),
    Family("llama_2", turns(" </s>", before=" "), tokens=(), bos="<s>", eos="</s>"),
    Family("vicuna", turns("</s>", before=" "), tokens=(), bos="<s>", eos="</s>", image_token="<image>"),
    Family("llava_next_mistral", turns("</s>", before=" "), tokens=(), bos="<s>", eos="</s>", image_token="<image>"),
    Family(  # its prompt and its turns differ by a blank before the line break
        "llava_onevision", IM_END, tokens=CHATML, eos="<|im_end|>", image_token="<image>"
    ),
    Family(
        "granite_vision",
        turns("<|end_of_text|>"),
        tokens=("<|system|>", "<|user|>", "<|assistant|>"),
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        image_token="<image>",
    ),
    Family(
        "granite_4",
        turns("<|end_of_text|>") | {"tools": [JSON_CALL + "<|end_of_text|>", WEATHER_ANSWER + "<|end_of_text|>"]},
        tokens=("<|start_of_role|>", "<|end_of_role|>"),
        plain_tokens=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        eos="<|end_of_text|>",
        image_token="<image>",
    ),
    Family(
        "gemma_3",
        turns("<end_of_turn>"),
        tokens=("<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        stop_tokens=("<eos>", "<end_of_turn>"),
        image_token="<start_of_image>",
    ),
    Family(
        "paligemma",  # one question, one answer
        turns("<eos>") | {"multi": None, "system": None, "reasoning": None},
        tokens=(),
        bos="<bos>",
        eos="<eos>",
        image_token="<image>",
    ),
    Family(
        "smolvlm",
        turns("<end_of_utterance>", before=" "),
        tokens=("<|im_start|>",),
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        image_token="<image>",
    ),
    Family("internvl", IM_END, tokens=CHATML, eos="<|im_end|>", image_token="<IMG_CONTEXT>"),
    Family(
        "deepseek_vl2",
        turns(DEEPSEEK_END, before=" "),
        tokens=("<|User|>", "<|Assistant|>"),
        bos="<｜begin▁of▁sentence｜>",
        eos=DEEPSEEK_END,
        image_token="<image>",
    ),
    Family(
        "deepseek_r1",  # content and arguments as strings; the answer to a tool's result has no header of its own
        turns(DEEPSEEK_END)
        | {
            "tools": [
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
                + ARGUMENTS_TEXT
                + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
                + DEEPSEEK_END,
                WEATHER_ANSWER + DEEPSEEK_END,
            ]
        },
        tokens=("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁sep｜>")
        + ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>")
        + ("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
        plain_tokens=("<think>", "</think>"),
        bos="<｜begin▁of▁sentence｜>",
        eos=DEEPSEEK_END,
    ),
    Family(
        "aya_vision",  # the prompt opens the response
        turns("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        tokens=COHERE_TURN,
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        image_token="<image>",
    ),
    Family(
        "command_a",
        turns("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", before="<|START_RESPONSE|>")
        | {
            "tools": [
                '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": '
                + ARGUMENTS_TEXT
                + "}\n]<|END_ACTION|><|END_OF_TURN_TOKEN|>",
                COHERE_ANSWER.format(WEATHER_ANSWER),
            ],
            "reasoning": [
                COHERE_THOUGHT.format(THOUGHT) + COHERE_ANSWER.format(ANSWER),
                COHERE_THOUGHT.format(OTHER_THOUGHT) + COHERE_ANSWER.format(OTHER_ANSWER),
            ],
        },
        tokens=(*COHERE_TURN, "<|START_THINKING|>", "<|END_THINKING|>", "<|START_ACTION|>", "<|END_ACTION|>")
        + ("<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>"),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        image_token="<|IMG_PATCH|>",
    ),
    Family("minicpm_v", IM_END, tokens=CHATML, eos="<|im_end|>", image_token="<image>"),
    Family(
        "molmo",
        turns("<|endoftext|>", before=" ") | {"system": None},
        tokens=(),
        eos="<|endoftext|>",
    ),
    Family(
        "kimi_vl",
        IM_END,
        tokens=(*KIMI, "<|media_start|>", "<|media_end|>"),
        bos="[BOS]",
        eos="<|im_end|>",
        image_token="<|media_pad|>",
    ),
    Family(
        "kimi_k2_5",
        IM_END
        | {
            "tools": [
                f"<|tool_calls_section_begin|><|tool_call_begin|>{CALL_ID}<|tool_call_argument_begin|>"
                f"{ARGUMENTS_TEXT}<|tool_call_end|><|tool_calls_section_end|><|im_end|>",
                WEATHER_ANSWER + "<|im_end|>",
            ],
            "reasoning": [ANSWER + "<|im_end|>", OTHER_THOUGHT + "</think>" + OTHER_ANSWER + "<|im_end|>"],
        },
        tokens=(*KIMI, "<|media_begin|>", "<|media_end|>", "<|tool_calls_section_begin|>", "<|tool_call_begin|>")
        + ("<|tool_calls_section_end|>", "<|tool_call_end|>", "<|tool_call_argument_begin|>"),
        plain_tokens=("<think>", "</think>"),
        bos="[BOS]",
        eos="<|im_end|>",
        image_token="<|media_pad|>",
    ),
    Family(
        "ernie_4_5_vl",  # the prompt has an empty thought, the rows have none
        turns("<|end_of_sentence|>"),
        tokens=("<|begin_of_sentence|>", "<|end_of_sentence|>", "<|IMAGE_START|>", "<|IMAGE_END|>"),
        plain_tokens=("<think>", "</think>"),
        bos="<s>",
        eos="</s>",
        image_token="<|image@placeholder|>",
    ),
    Family(
        "lfm2_vl",  # renders tools and their results, but no calls
        IM_END,
        tokens=(
            *CHATML,
            "<|tool_list_start|>",
            "<|tool_list_end|>",
            "<|tool_response_start|>",
            "<|tool_response_end|>",
        ),
        bos="<|startoftext|>",
        eos="<|im_end|>",
        image_token="<image>",
    ),
    Family(
        "hermes",
        IM_END | {"tools": QWEN_TOOLS},
        tokens=CHATML,
        plain_tokens=("<tool_call>", "</tool_call>"),
        bos="<|begin_of_text|>",
        eos="<|im_end|>",
    ),
    Family(
        "yi_vl",
        turns("<|endoftext|>", before=" "),
        tokens=(),
        bos="<|startoftext|>",
        eos="<|endoftext|>",
        image_token="<image_placeholder>",
    ),
    Family("strings_only", turns("</s>") | {"system": None}, tokens=(), bos="<s>", eos="</s>", image_token="<image>"),
]
