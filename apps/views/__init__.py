"""The views of the explorer, one a module: pure functions of what a client asks for, and the part of
the page they fill.
"""
