"""The methods INTRA is compared with: lexical search, chance, and the oracle."""
