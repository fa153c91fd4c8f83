"""The prompts of a llama.cpp server as token ids. It has paths for them; vLLM sends them with the answer."""

from collections.abc import Mapping
from typing import Any

import httpx

from tuning.serving.server import find_key


def read_prompt_ids(url: str, body: Mapping[str, Any], timeout: float) -> list[int]:
    """The ids of a prompt without pictures. Raises `httpx.HTTPError`."""
    root, headers = url.removesuffix("/v1"), {"Authorization": f"Bearer {find_key()}"}

    def post(path: str, content: Mapping[str, Any]) -> dict[str, Any]:
        return httpx.post(root + path, json=content, headers=headers, timeout=timeout).raise_for_status().json()

    prompt = post("/apply-template", body)["prompt"]
    return post("/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]
