"""Take pictures of what people see, to look at after a change: the report on a phone, a desktop and in print, light and dark; the live
table of training; the first page of the documentation.

example, of what launch/quickstart.sh has made:
  python tools/docs/screenshots.py runs/quickstart --output build/screenshots

Needs Chromium with its driver (Debian: chromium-driver) and the extra `docs`. The live table is that of a short run with the config of
WORKSPACE/iw-sft; live-table.svg is also the picture in docs/.
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.support.browser import Browser  # noqa: E402

PHONE, DESKTOP, PAPER, TERMINAL = 375, 1280, 794, 1000  # pixels
COLUMNS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path, metavar="WORKSPACE", help="directory of launch/quickstart.sh")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "screenshots", metavar="DIR")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, Browser() as browser:
        site = build_site(Path(scratch) / "site")
        table = args.output / "live-table.svg"
        table.write_text(as_svg(live_table(args.workspace / "iw-sft" / "config.yaml", Path(scratch))), encoding="utf-8")
        for page, name, width, scheme, media in [
            (args.workspace / "report.html", "report-phone", PHONE, "light", "screen"),
            (args.workspace / "report.html", "report-phone-dark", PHONE, "dark", "screen"),
            (args.workspace / "report.html", "report-desktop", DESKTOP, "light", "screen"),
            (args.workspace / "report.html", "report-desktop-dark", DESKTOP, "dark", "screen"),
            (args.workspace / "report.html", "report-print", PAPER, "light", "print"),
            (table, "live-table", TERMINAL, "light", "screen"),
            (site / "index.html", "site-phone", PHONE, "light", "screen"),
            (site / "index.html", "site-desktop", DESKTOP, "light", "screen"),
            (site / "index.html", "site-desktop-dark", DESKTOP, "dark", "screen"),
        ]:
            browser.open(page, width=width, scheme=scheme, media=media)
            browser.screenshot(args.output / f"{name}.png")
            print(args.output / f"{name}.png", flush=True)


def build_site(directory: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(directory)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    return directory


def live_table(config: Path, scratch: Path) -> str:
    """What a terminal shows in the middle of a run on two processes: the table as it was drawn then, with its colours."""
    launched = "-m megatron_iwsft.distributed.torchrun --nproc_per_node 2 -m megatron_iwsft train --config".split()
    command = [sys.executable, *launched, str(config), f"run.dir={scratch}/run", "export.at_end=false"]
    reader, writer = pty.openpty()
    environment = os.environ | {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    with subprocess.Popen([*command, "logging.console=live"], cwd=ROOT, env=environment, stdout=writer) as process:
        os.close(writer)
        shown = b"".join(iter(lambda: _read(reader), b"")).decode()
    assert process.returncode == 0, shown
    erased = r"\r\x1b\[2K(?:\x1b\[1A\x1b\[2K)*"  # by which rich replaces one frame with the next
    frames = [frame for frame in re.split(erased, shown.replace("\r\n", "\n")) if "left" in frame]
    return frames[len(frames) // 2]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # every writer has closed it
        return b""


def as_svg(frame: str) -> str:
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(frame.rstrip()))
    return console.export_svg(title="iwsft train")


if __name__ == "__main__":
    main()
