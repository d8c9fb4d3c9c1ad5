"""The run directory: what ``sekd_fairseq`` writes and ``analysis`` reads, in one place.

Needs numpy and pyarrow, neither torch nor pandas.

===============  ==================================================================================
run_record       ``run.json`` and ``scores.json``; where runs are
token_records    ``tokens/<subset>/<step>.parquet``: columns, writing, reading, checks
texts            lines of text, translations with their references and sources
methods          what a method is called, where it stands, whether it is a treatment
languages        codes of languages, sacreBLEU's tokenizer for each
files            checksums that files carry, files that are complete or not there
errors           errors that a user can mend, and how commands show them
simulated        simulated runs, for tests and benchmarks
===============  ==================================================================================
"""
