from subspace3d.cli import main

main()
