"The command `cudlab`, as `python -m cudlab`."

import sys

from cudlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
