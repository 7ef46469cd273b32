"""How alike representations are: estimators and tests behind the analysis `similarity`."""
