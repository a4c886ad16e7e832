"""Pure rules: no database, no clock of their own, no Flask."""
