"""Rules by which frameworks' memory is predicted: arithmetic on shapes, no library of theirs.

A framework's file answers `predict` with the rules here that are its own. What several share:
`question` (what is asked), `stored` (bytes of weights by format), `caches`, `caching_allocator`.
"""
