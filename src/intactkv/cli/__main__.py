from intactkv.cli import main

main()
