"The code that travels with a diffusers folder: a module and all that it imports from beside it."

import re
from pathlib import Path

IMPORT = re.compile(r"^from \.(\w+) import", re.M)


def find_code(
    name,  # of a module
    read,  # name of a module -> its text
) -> dict:
    "Name -> text of a module and of those it imports relatively, and so on."
    found, left = {}, [name]
    while left:
        name = left.pop()
        if name not in found:
            found[name] = read(name)
            left += IMPORT.findall(found[name])
    return found


def copy_code(
    file,  # a module
    folder,  # where its code shall be, too
) -> None:
    "Copy a module and what it imports relatively."
    file = Path(file)
    read = lambda name: file.with_name(f"{name}.py").read_text()  # noqa: E731
    for name, text in find_code(file.stem, read).items():
        (Path(folder) / f"{name}.py").write_text(text)
