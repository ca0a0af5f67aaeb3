"""Signed and unsigned claims about files, in the formats of the field: in-toto, DSSE, C2SP."""
