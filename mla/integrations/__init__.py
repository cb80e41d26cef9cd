"""Attention and caches of this package inside other libraries; import the one you need."""
