"""Print the table of launch/quickstart.sh and what it shows, from the summary of `iwsft evaluate`: quickstart_result.py SUMMARY.json"""

import json
import sys
from pathlib import Path
from textwrap import fill
from typing import Any

EVALUATED = ("SFT", "base model", "iw-SFT")  # in this order: `iwsft evaluate` compares every model with the first
SHOWN = ("base model", "SFT", "iw-SFT")
WIDTH = 40
NOISE = 0.05  # of the exact paired test, as in the report
WHY = (
    "iw-SFT weighs each answer by how much likelier the model has come to find it than the base model did: right answers, which the "
    "filter kept more often, gain probability, so they gain weight, so they gain more."
)


def main() -> None:
    summary = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    models = dict(zip(EVALUATED, summary["models"].values(), strict=True))
    for name in SHOWN:
        model = models[name]
        mean, low, high = (100 * model["pass@1"][key] for key in ("mean", "low", "high"))
        bar = "█" * round(WIDTH * mean / 100)
        print(f"  {name:<11} {bar:<{WIDTH}} {mean:5.1f} %  [{low:.1f}, {high:.1f}]")
    print(f"\n{fill(sentence(summary), 100)}")


def sentence(summary: dict[str, Any]) -> str:
    """What the comparison of iw-SFT with SFT says, and if iw-SFT is better, why."""
    sft, _, iw_sft = summary["models"]
    found = next(c for c in summary["comparisons"] if (c["from"], c["to"]) == (sft, iw_sft))
    difference, low, high = (100 * found[key] for key in ("difference", "low", "high"))
    p = "p < 1e-12" if found["p_value"] < 1e-12 else f"p = {found['p_value']:.2g}"
    measured = f"{difference:+.1f} points [{low:+.1f}, {high:+.1f}], {p} in an exact paired test"
    if found["p_value"] >= NOISE:
        return (
            f"iw-SFT and SFT cannot be told apart here: {measured}. More held-out problems or other seeds would tell."
        )
    if difference < 0:
        return f"iw-SFT answers fewer problems right than SFT: {measured}. Its weights did not help here."
    return f"iw-SFT answers more problems right than SFT: {measured}. {WHY}"


if __name__ == "__main__":
    main()
