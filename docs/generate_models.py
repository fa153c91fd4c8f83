"""Write docs/models.md from runs of tiny checkpoints: about 10 minutes.

python docs/generate_models.py [NAME …]    with names, only the rows of these architectures are measured again
"""

import sys
from pathlib import Path

import tuning  # before transformers imports torchvision  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


def main(names: list[str]) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from architectures import page
    from tqdm import tqdm

    lines = page.read_page()
    for name in tqdm(names or sorted(page.ARCHS)):
        lines[name] = page.measure(name)
        page.write_page(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
