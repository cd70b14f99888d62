"The page talks to itself: on this machine nothing goes to a proxy."

import contextlib
import os


@contextlib.contextmanager
def bypass_proxies():
    "Within, no request of this process goes to a proxy; jobs started later have theirs again."
    before = {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")}
    os.environ.update(dict.fromkeys(before, "*"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
