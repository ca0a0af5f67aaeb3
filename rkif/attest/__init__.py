"""Signed and unsigned claims about files, in standard formats: in-toto, DSSE, C2SP."""
