"""Compiled equivalents of what the engine does to every element of every tensor, for the processor.

A merge comes near the speed of memory only if its many steps pass their results on in the processor's caches. Here a
chunk that sits in the second-level cache is worked on in tiles that stay in the first. The results are those of the
torch functions in `evomerge.methods`, bit for bit: the same IEEE operations in the same order, no fused multiply-add,
no reassociation.

`merging` takes float32. `looking`, which only looks at tensors, reads the bits of stored elements instead, uint16 for
bfloat16 and uint32 for float32, so that a model is read once and nothing is written. Every function releases the
interpreter's lock; threads are the caller's business.
"""
