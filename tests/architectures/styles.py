"""How families write a chat: the text before and after each turn, and what ends an answer."""

from dataclasses import dataclass, field


def quote(text: str) -> str:
    """A Jinja string."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


@dataclass
class Style:
    """A family's way of writing a chat. `turns`: role → (before, after).

    `alone`: system messages are written as turns; else they go before the first user text. `adds_eos`: the published
    template writes no end token (the project then documents that it adds the tokenizer's).
    """

    bos: str
    turns: dict
    eos: str
    image: str = "<image>"
    images_first: bool = False
    has_system: bool = True
    fold_system: bool = False
    adds_eos: bool = False
    specials: tuple = ()
    role_names: dict = field(default_factory=dict)

    def jinja(self) -> str:
        """The chat template."""
        image, text = f"{{{{ {quote(self.image)} }}}}", "{{ p['text'] }}"
        if self.images_first:
            words = f"{{% for p in c if p['type'] == 'image' %}}{image}{{% endfor %}}"
            words += f"{{% for p in c if p['type'] == 'text' %}}{text}{{% endfor %}}"
        else:
            words = f"{{% for p in c %}}{{% if p['type'] == 'image' %}}{image}{{% elif p['type'] == 'text' %}}{text}"
            words += "{% endif %}{% endfor %}"
        made = "{%- macro words(c) -%}{% if c is string %}{{ c }}{% else %}" + words + "{% endif %}{%- endmacro -%}"
        made += f"{{{{ {quote(self.bos)} }}}}" if self.bos else ""
        if self.fold_system:
            made += "{% set ns = namespace(before='') %}{% if messages[0]['role'] == 'system' %}"
            made += "{% set ns.before = words(messages[0]['content']) + '\\n\\n' %}{% set messages = messages[1:] %}"
            made += "{% endif %}"
        made += "{% for m in messages %}"
        for number, (role, (before, after)) in enumerate(self.turns.items()):
            first = "{% if loop.first %}{{ ns.before }}{% endif %}" if self.fold_system and role == "user" else ""
            made += f"{{% {'elif' if number else 'if'} m['role'] == '{role}' %}}{{{{ {quote(before)} }}}}{first}"
            made += f"{{{{ words(m['content']) }}}}{{{{ {quote(after)} }}}}"
        prompt = quote(self.turns["assistant"][0].rstrip(" "))
        return f"{made}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}"

    @property
    def header(self):
        """What stands before an answer, as far as it is tokens of its own."""
        return (self.turns["assistant"][0] or self.turns["user"][1]).rstrip(" ")

    @property
    def end(self):
        return self.eos if self.adds_eos else self.turns["assistant"][1].strip()


def chatml(image, bos="", **more):
    def t(r):
        return (f"<|im_start|>{r}\n", "<|im_end|>\n")

    return Style(
        bos,
        {r: t(r) for r in ("system", "user", "assistant")},
        "<|im_end|>",
        image,
        specials=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        **more,
    )


def gemma(image):
    def t(r):
        return (f"<start_of_turn>{r}\n", "<end_of_turn>\n")

    return Style(
        "<bos>",
        {"user": t("user"), "assistant": t("model")},
        "<end_of_turn>",
        image,
        fold_system=True,
        specials=("<start_of_turn>", "<end_of_turn>", "<eos>"),
    )


def gemma4(image):
    def t(r):
        return (f"<|turn>{r}\n", "<turn|>\n")

    return Style(
        "<bos>",
        {"system": t("system"), "user": t("user"), "assistant": t("model")},
        "<turn|>",
        image,
        specials=("<|turn>", "<turn|>", "<eos>"),
    )


def llama3(image, h=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")):
    def t(r):
        return (f"{h[0]}{r}{h[1]}\n\n", h[2])

    return Style(
        "<|begin_of_text|>",
        {r: t(r) for r in ("system", "user", "assistant")},
        h[2],
        image,
        specials=(*h, "<|end_of_text|>"),
    )


def mistral(image):
    return Style(
        "<s>",
        {"system": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "user": ("[INST]", "[/INST]"), "assistant": ("", "</s>")},
        "</s>",
        image,
        specials=("</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    )


def vicuna(image="<image>\n", end="</s>", bos=""):
    return Style(
        bos,
        {"system": ("", " "), "user": ("USER: ", " "), "assistant": ("ASSISTANT: ", end)},
        "</s>",
        image,
        images_first=True,
        specials=("</s>",),
    )


def cohere(image):
    def t(r, a="", z=""):
        return (f"<|START_OF_TURN_TOKEN|><|{r}_TOKEN|>{a}", f"{z}<|END_OF_TURN_TOKEN|>")

    return Style(
        "<BOS_TOKEN>",
        {"system": t("SYSTEM"), "user": t("USER"), "assistant": t("CHATBOT", "<|START_RESPONSE|>", "<|END_RESPONSE|>")},
        "<|END_OF_TURN_TOKEN|>",
        image,
        specials=(
            "<|START_OF_TURN_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
            "<|END_OF_TURN_TOKEN|>",
        ),
    )


def glm(image):
    def t(r):
        return (f"<|{r}|>\n", "")

    return Style(
        "[gMASK]<sop>",
        {r: t(r) for r in ("system", "user", "assistant")},
        "<|endoftext|>",
        image,
        adds_eos=True,
        specials=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"),
    )


def idefics(image="<image>", start="<s>", end="<end_of_utterance>"):
    def t(r):
        return (f"{r}: ", f"{end}\n")

    return Style(
        start,
        {"system": t("System"), "user": t("User"), "assistant": t("Assistant")},
        end,
        image,
        specials=(end, "</s>", "<|im_start|>", "<|im_end|>"),
    )


def deepseek(image, eos="<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>", names=("User", "Assistant")):
    return Style(
        bos,
        {"system": ("", "\n\n"), "user": (f"{names[0]}: ", "\n\n"), "assistant": (f"{names[1]}: ", eos)},
        eos,
        image,
        specials=(eos,),
    )


def granite(image):
    def t(r):
        return (f"<|start_of_role|>{r}<|end_of_role|>", "<|end_of_text|>\n")

    return Style(
        "",
        {r: t(r) for r in ("system", "user", "assistant")},
        "<|end_of_text|>",
        image,
        specials=("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    )


def exaone(image):
    def t(r):
        return (f"[|{r}|]\n", "<|endofturn|>\n")

    return Style(
        "",
        {r: t(r) for r in ("system", "user", "assistant")},
        "<|endofturn|>",
        image,
        specials=("[|system|]", "[|user|]", "[|assistant|]", "<|endofturn|>"),
    )


def kimi(image):
    def t(r):
        return (f"<|im_{r}|>{r}<|im_middle|>", "<|im_end|>")

    return Style(
        "",
        {r: t(r) for r in ("system", "user", "assistant")},
        "<|im_end|>",
        image,
        specials=("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"),
    )


def ernie(image):
    return Style(
        "<|begin_of_sentence|>",
        {"system": ("", "\n"), "user": ("User: ", "\n"), "assistant": ("Assistant: ", "<|end_of_sentence|>")},
        "<|end_of_sentence|>",
        image,
        specials=("<|end_of_sentence|>",),
    )


def hunyuan(image):
    return Style(
        "<｜hy_begin▁of▁sentence｜>",
        {
            "system": ("", "<｜hy_place▁holder▁no▁3｜>"),
            "user": ("", "<｜hy_User｜>"),
            "assistant": ("", "<｜hy_Assistant｜>"),
        },
        "<｜hy_Assistant｜>",
        image,
        specials=("<｜hy_place▁holder▁no▁3｜>", "<｜hy_User｜>", "<｜hy_Assistant｜>"),
    )
