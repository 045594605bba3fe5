// Runs all tests, or those whose name contains the first argument. A second
// argument is the seed of the random inputs.
#include "check.h"

#include <chrono>

bool &flush_mode() {
	static bool flush = false;
	return flush;
}

int main(int argc, char **argv) {
	setvbuf(stdout, nullptr, _IOLBF, 0);
	uint64_t seed = argc > 2 ? strtoull(argv[2], nullptr, 10) : std::random_device{}();
	printf("seed %llu\n", static_cast<unsigned long long>(seed));
	int failures = 0, ran = 0;
	for (auto &t : Test::all()) {
		if (argc > 1 && !strstr(t.name, argv[1])) continue;
		auto begin = std::chrono::steady_clock::now();
		for (bool flush : {false, true}) {
			flush_mode() = flush;
			Check c;
			c.rng.seed(seed);
			c.name = t.name;
			if (flush) c.name += " (unaligned)";
			t.f(c);
			failures += c.failures;
		}
		ran++;
		printf("%-28s %.1f s\n", t.name, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
	}
	if (!ran) return puts("no such test"), 1;
	printf(failures ? "%d failures\n" : "ok\n", failures);
	return failures != 0;
}
