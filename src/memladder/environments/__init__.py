"""Whose Python runs a framework: memladder's own, or an environment of the framework's.

Frameworks pin conflicting versions of torch, so each may live in an environment of its own: made
from the pinned requirements in `frameworks/requirements`, or one that is there already. Everything
of a framework runs in its environment: what it prepares, its reference, its session. Frameworks
whose keys begin with the same word share it.

`interpreter` finds the Python of a framework, `probe` runs inside it, `ask` asks it from outside,
`install` makes environments and removes them.
"""
