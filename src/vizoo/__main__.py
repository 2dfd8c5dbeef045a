from vizoo.tools.cli import main

raise SystemExit(main())
