"""Chapters of the report: each owns its tables, its figure and its caption.

===============  ==================================================================================
claims           effects of the claims by direction
quality          BLEU, chrF and COMET of every run
methods          the same over seeds, with gains
transfer         KL to the teacher by bucket, gains over the baselines
difficulty       how hard the tokens are for each method
training         easy and hard tokens while a run trains
transitions      tokens that move between easy and hard
sensitivity      one hyper-parameter at a time
sentences        quality gained against transfer gained
examples         sentences, token by token
===============  ==================================================================================
"""
