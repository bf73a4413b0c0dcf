"""`python data.py check FILE`: as it was called before there was prepare.py."""

from prepare import BadRow, main, main_guard

if __name__ == "__main__":
    main_guard(main, BadRow)
