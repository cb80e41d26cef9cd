"""Plain PyTorch written for speed, ``impl="torch"``: runs on every device, needs nothing else.

On a CPU the host reads lengths and tables and works on exact slices, so nothing is masked and
unused memory is never touched. On other devices reading them would stall the queue, so batches
are processed whole under a mask.
"""
