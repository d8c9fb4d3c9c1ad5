"""Models that the plugin adds; fairseq imports the modules of this folder for ``--user-dir``."""
