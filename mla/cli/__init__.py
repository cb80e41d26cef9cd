"""The commands of ``python -m mla``: one file each, with ``add_arguments`` and ``run``."""
