import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # one thread a worker: more would wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell has its background jobs ignore Ctrl-C
for folder in ("", "tests", "benchmarks"):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / folder))
