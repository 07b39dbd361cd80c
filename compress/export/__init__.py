"""Exporters: a model folder in, a folder for another runtime out. One format a file."""
