"""python -m dspark_edge.runtime.cli"""

from dspark_edge.runtime.cli import main

if __name__ == "__main__":
    main()
