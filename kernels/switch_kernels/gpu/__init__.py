"""Triton kernels and their launchers. Imported only where the Triton backend is used.

Rows in expert order are aligned: expert e owns rows start_E1[e] to start_E1[e + 1] - 1, every start is a multiple of `ALIGN`, its (token, slot)
pairs come first and padding rows, whose operands are zero, fill the rest. So no tile of a product mixes two experts, and sums over an expert's
rows need no masks. Sizes are compile-time constants, counts of rows are not; nothing reads device data on the host, and nothing is atomic: a
step can be captured in a CUDA graph and gives the same bits every time.
"""
