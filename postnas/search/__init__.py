"""The search: what a placement costs and scores, and strategies that know no more than that."""
