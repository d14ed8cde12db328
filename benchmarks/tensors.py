"""What becomes of a checkpoint in which one tensor is lost, renamed, added or of another shape: the table of faults.md.

    python benchmarks/tensors.py [FAMILY …] [--every N] [--page]

Every N-th tensor of each family of `tests/zoo.py` is changed in four ways (`tests/tampering.py`). The checkpoint has to be
refused, or to give the same features bit for bit, and that only if transformers' own forward pass does not depend on the
tensor. With --page the table goes into docs/measurements/faults.md.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import page
import tampering
import transformers
import zoo


def main() -> None:
    """Try the families that were asked for, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(zoo.ZOO)}; default: all")
    parser.add_argument("--every", type=int, default=1, help="every N-th tensor of a family: 1")
    parser.add_argument("--page", action="store_true", help="write into docs/measurements/faults.md")
    asked = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    total: Counter[str] = Counter()
    families = asked.families or list(zoo.ZOO)
    for name in families:
        with tempfile.TemporaryDirectory() as folder:
            found = tampering.family(name, Path(folder), asked.every)
        print(name, dict(found), flush=True)
        total += found
    rows = [
        [f"a tensor is {how}" if how != "one added" else "a tensor is added beside one"]
        + [f"{total[f'{how}: {outcome}']:,}" for outcome in tampering.OUTCOMES]
        for how in tampering.EDITS
    ]
    rows.append(["**all**", *(f"**{total[outcome]:,}**" for outcome in tampering.OUTCOMES)])
    text = f"{len(families)} families, {total['tensors']:,} tensors"
    text += f" (one in {asked.every} of each family)" if asked.every > 1 else ""
    text += f".\n\n{page.table(['fault', *tampering.OUTCOMES], rows)}"
    print(text)
    if asked.page:
        page.put("measurements/faults.md", "tensors", text)


if __name__ == "__main__":
    main()
