"""Run a program where the lab cannot be imported: python -I alone.py PROGRAM [ARGUMENT ...]"""

import runpy
import sys

sys.modules["cudlab"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
