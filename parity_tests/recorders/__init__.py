"""Makes recordings from checkouts of the authors' code; needs what that code needs, and nothing of this package."""
