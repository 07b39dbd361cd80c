"""What ships with the package to read and to ask: a small world told by a seeded generator.

``builtin:stories`` is a text in four splits, ``builtin:tasks`` the questions about the same world with
exact answers, all of them from the test split. Nothing is stored: the same version gives the same bytes
on every machine and every Python, because every draw goes through the one function of `random` that
Python promises never to change.

Splits share nothing, by construction: a document consists of problems, the identity of a problem decides
its split by a hash (`splits.split_of`), and a document is made of problems of its own split alone.

Nothing here imports torch.
"""
