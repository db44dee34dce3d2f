"""Where each library keeps the attention whose keys ISR reduces: one table per library.

A table maps attention classes, by name, to rules, so no library is imported that the model does not
come from. ``Outer:path`` stands for the module at a path below a class, with * for any index, and
comes before the module's own class. Grids that only one library has stand beside its table.
"""
