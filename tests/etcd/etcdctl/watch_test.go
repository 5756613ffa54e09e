package etcdctl

var watchScenarios = []scenario{
	{name: "watch what happens", steps: join(fruit, []step{
		{args: "watch apple", talk: []turn{
			{watchers: 1},
			{run: "put apple live", lines: 3},
			{run: "put apples other"},
			{run: "del apple", lines: 3},
			{run: "del apple"},
			{run: "put apple ''", lines: 3},
		}},
		{args: "watch a --prefix --prev-kv", talk: []turn{
			{watchers: 1},
			{run: "put apple again", lines: 5},
			{run: "put avocado new", lines: 3},
			{run: "put banana other"},
			{run: "del a --prefix", lines: 20},
			{run: "put apple back", lines: 3},
		}},
		{args: "watch '' --prefix", talk: []turn{
			{watchers: 1},
			{run: "put anything 1", lines: 3},
		}},
		{args: "watch banana date", talk: []turn{
			{watchers: 1},
			{run: "put banana 1", lines: 3},
			{run: "put date outside"},
			{run: "put cherry inside", lines: 3},
		}},
		{args: "watch apple -w json", talk: []turn{
			{watchers: 1},
			{run: "put apple 1", lines: 1},
			{run: "put other 1"},
			{run: "del apple", lines: 1},
		}},
		{args: "watch apple -w fields --prev-kv", talk: []turn{
			{watchers: 1},
			{run: "put apple 1", lines: 11},
			{run: "put apple 2", lines: 17},
		}},
		{args: "watch apple --hex", talk: []turn{{watchers: 1}, {run: "put apple 1", lines: 3}}},
		// The server is asked for nothing before revision 100, and the store is far from it.
		{args: "watch apple --rev=100", talk: []turn{{watchers: 1}, {run: "put apple early"}}},
	}, commands("get '' --prefix -w json"))},

	{name: "watch what has happened", steps: join(fruit, []step{
		{args: "watch apple --rev=2", talk: []turn{{lines: 6}, {run: "put apple late", lines: 3}}},
		{args: "watch '' --prefix --rev=1 --prev-kv", talk: []turn{{lines: 30}, {run: "del date", lines: 5}, {run: "put date again", lines: 3}}},
		{args: "watch banana date --rev=3", talk: []turn{{lines: 9}}},
		{args: "watch banana --rev=4", talk: []turn{{lines: 3}}},
		{args: "watch apple --rev=2 -w json", talk: []turn{{lines: 1}}},
		{args: "watch '' --prefix --rev=3 --prev-kv -w json", talk: []turn{{lines: 1}}},
		{args: "watch apple --rev=5 -w fields", talk: []turn{{lines: 18}}},
		{args: "watch '' --prefix --rev=11", talk: []turn{{lines: 3}}},
	}, commands("compact 6"), []step{
		{args: "watch apple --rev=2"},
		{args: "watch apple --rev=2 -w json"},
		{args: "watch '' --prefix --rev=5"},
		{args: "watch '' --prefix --rev=6 --prev-kv", talk: []turn{{lines: 24}}},
	})},

	{name: "watch that runs a command", steps: join(fruit, []step{
		{args: "watch apple --rev=2 -- sh -c 'echo $ETCD_WATCH_REVISION $ETCD_WATCH_EVENT_TYPE $ETCD_WATCH_KEY $ETCD_WATCH_VALUE'", talk: []turn{
			{lines: 8},
			{run: "put apple live", lines: 4},
			{run: "del apple", lines: 4},
		}},
		{args: "watch a --prefix --rev=5 --prev-kv -- echo event", talk: []turn{{lines: 22}}},
		{args: "watch apple --rev=2 -- sh -c 'exit 3'"},
		{args: "watch apple --rev=2 -- no-such-command"},
	})},

	// A progress response is for all watchers of the stream, and printed for each. None is asked for before a watch in the past has
	// printed what there was: etcd does not answer it then (docs/compatibility.md).
	{name: "interactive watch", steps: join(fruit, []step{
		{args: "watch -i", talk: []turn{
			{say: "watch apple", watchers: 1},
			{say: "progress", lines: 1},
			{say: "watch b --prefix", watchers: 2},
			{say: "progress", lines: 2},
			{run: "put apple live", lines: 3},
			{run: "put blueberry 1", lines: 3},
			{run: "put cherry unwatched"},
			{say: "progress", lines: 2},
			{say: "watch apple --rev=2 --prev-kv", watchers: 3, lines: 13},
			{say: "progress", lines: 3},
			{say: "watch date elder --rev=6", watchers: 4, lines: 3},
			{say: "watch cherry --rev=4 -- sh -c 'echo $ETCD_WATCH_KEY'", watchers: 5, lines: 8},
			{say: "progress", lines: 5},
			{run: "del b --prefix", lines: 6},
			{say: "progress", lines: 5},
		}},
		{args: "watch -i -w json", talk: []turn{
			{say: "watch apple --rev=2", lines: 1},
			{say: "progress", lines: 2},
			{run: "put apple again", lines: 1},
		}},
		// Without a watcher nothing is answered. This etcdctl has no word for a cancel.
		{args: "watch -i", talk: []turn{
			{say: "progress"},
			{say: "watch apple", watchers: 1},
			{say: "nonsense"},
			{say: "cancel 1"},
			{say: " "},
			{say: "watch"},
			{say: "progress", lines: 1},
		}},
		{args: "watch -i", stdin: "watch a b --prefix\n"},
		{args: "watch -i", stdin: "watch --nonsense\n"},
	})},

	{name: "watch progress", flags: []string{"--watch-progress-notify-interval=100ms"},
		// How often it is said until the end depends on time; each time it must be the same.
		masks: []mask{hide(`(progress notify: 3\n)+`, "progress notify: 3\n")},
		steps: []step{
			{args: "put a 1"},
			{args: "put a 2"},
			{args: "watch a --progress-notify", talk: []turn{{lines: 2}}},
			{args: "watch a --progress-notify --rev=2", talk: []turn{{lines: 7}}},
			{args: "watch b", talk: []turn{{watchers: 1}, {run: "put b 1", lines: 3}}},
		}},

	{name: "watch that is refused", steps: commands(
		"watch",
		"watch a b --prefix",
		"watch a --nonsense",
		"watch a --rev=nonsense",
		"watch a --",
		"watch -i",
	)},
}
