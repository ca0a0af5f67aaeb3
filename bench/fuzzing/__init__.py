"""Random damage, random calls and random kills: what rkif does with them."""
