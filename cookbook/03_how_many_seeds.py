"""How many candidate seeds does FedKSeed need? Rouge-L, loss, bytes and catch-up time against K, and what they allow
to say.

    python cookbook/03_how_many_seeds.py            # from cookbook/benchmarks/results/seeds.json, in a second
    python cookbook/03_how_many_seeds.py --small    # runs three values of K first, some minutes

Writes `runs/cookbook-03/seeds.html` and prints the statement. In kind this is the case study of arXiv 2408.10691 (does
the number of seeds matter to Rouge-L?); model, data and figures are ours, and no figure of theirs is reproduced.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.seeds_page import page
from benchmarks.seeds_statement import Study, statement

HERE = Path(__file__).parent
FOLDER = Path("runs/cookbook-03")


def main() -> None:
    small = "--small" in sys.argv[1:]
    source = HERE / "benchmarks" / "results" / "seeds.json"
    if small:
        source = FOLDER / "seeds_small.json"
        command = [sys.executable, str(HERE / "benchmarks" / "seeds.py"), "--small", "--output", str(source)]
        source.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(command, check=True)
    study = Study(json.loads(source.read_text(encoding="utf-8")))
    said = statement(study)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "seeds.html").write_text(page(study, said), encoding="utf-8")
    print("\n".join(said))
    print(f"the figure: {FOLDER / 'seeds.html'}")


if __name__ == "__main__":
    main()
