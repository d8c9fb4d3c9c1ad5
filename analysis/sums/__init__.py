"""Every run read once and reduced to sums by bucket and sentence, frozen from then on.

===============  ==================================================================================
loading          from run directories to directions: what fits together, each run read once
direction        the values that all tables are made from
selection        whose difficulty cuts the tokens when runs are compared
pairing          variants of methods, and which run is compared with which
buckets          ways to cut the tokens
bucket_sums      sums over tokens by bucket and sentence
translations     sacreBLEU's statistics of every run's translations
significance     its intervals and tests of them
comet            COMET, where it is installed
===============  ==================================================================================
"""
