"""Comparisons with other published ways to make a trained model cheaper; not in the package."""
