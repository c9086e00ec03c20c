import sys
from pathlib import Path

for folder in ("", "tests", "benchmarks"):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / folder))
