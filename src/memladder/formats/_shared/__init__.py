"""What formats' files share: the interface (`base`), 8-bit elements, microscaling."""
