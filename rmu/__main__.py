from rmu.cli import main

raise SystemExit(main())
