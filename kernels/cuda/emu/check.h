// What the tests share: guarded memory, random inputs, launches under three
// thread orders whose results must agree bit for bit, and comparisons with
// float64 references.
#pragma once

#include "emu.h"
#include "kernels.h"

#include <functional>
#include <random>
#include <string>
#include <sys/mman.h>
#include <vector>

const double kU32 = 1.0 / (1 << 24);  // unit roundoff of float32
const double kUBf16 = 1.0 / (1 << 8); // of bf16

inline double widen(bf16 x) { return emu::bf(x); }
inline double widen(float x) { return x; }
inline double widen(double x) { return x; }
inline bf16 to_bf16(double x) { return emu_bf16(float(x)); }
template <class T>
T narrow(double x);
template <>
inline bf16 narrow<bf16>(double x) { return to_bf16(x); }
template <>
inline float narrow<float>(double x) { return float(x); }

struct Check {
	std::mt19937_64 rng;
	std::string name;
	int failures = 0;

	double normal() { return std::normal_distribution<double>()(rng); }
	double uniform() { return double(rng() >> 40) / double(1 << 24); }
	int below(int n) { return int(rng() % uint64_t(n)); }

	void fail(const std::string &what) {
		if (failures++ < 20) printf("FAIL %s: %s\n", name.c_str(), what.c_str());
	}
	void near(const std::string &what, size_t i, double got, double want, double tolerance) {
		if (got == want || (got != got && want != want)) return;
		if (!(std::abs(got - want) <= tolerance))
			fail(what + "[" + std::to_string(i) + "] is " + std::to_string(got) + ", expected " + std::to_string(want) + " within " + std::to_string(tolerance));
	}
	void equal(const std::string &what, size_t i, double got, double want) { near(what, i, got, want, 0); }
};

// Buf is device memory. Flush buffers end at a page that may not be touched and
// are therefore often unaligned; others start at a multiple of 16 and have a
// canary of up to 15 bytes before that page.
bool &flush_mode();

template <class T>
struct Buf {
	T *p;
	size_t n;
	unsigned char *map;
	size_t pages;

	explicit Buf(size_t count) : n(count) {
		size_t bytes = n * sizeof(T);
		pages = (bytes + 16 + 4095) / 4096 * 4096;
		map = static_cast<unsigned char *>(mmap(nullptr, pages + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
		mprotect(map + pages, 4096, PROT_NONE);
		memset(map, 0xfb, pages);
		p = reinterpret_cast<T *>(map + pages - (flush_mode() ? bytes : (bytes + 15) / 16 * 16));
	}
	Buf(const std::vector<T> &x) : Buf(x.size()) {
		if (n) memcpy(p, x.data(), n * sizeof(T));
	}
	Buf(const Buf &) = delete;
	~Buf() {
		for (unsigned char *c = reinterpret_cast<unsigned char *>(p + n); c < map + pages; c++)
			if (*c != 0xfb) printf("FAIL: write past the end of a buffer of %zu elements\n", n), abort();
		for (unsigned char *c = map; c < reinterpret_cast<unsigned char *>(p); c++)
			if (*c != 0xfb) printf("FAIL: write before a buffer of %zu elements\n", n), abort();
		munmap(map, pages + 4096);
	}
	operator T *() const { return p; }
	T &operator[](size_t i) { return p[i]; }
	std::vector<unsigned char> bytes() const { return {reinterpret_cast<unsigned char *>(p), reinterpret_cast<unsigned char *>(p + n)}; }
};

// Saved is a type-erased Buf whose contents can be taken and put back.
struct Saved {
	void *p;
	size_t bytes;
	template <class T>
	Saved(Buf<T> &b) : p(b.p), bytes(b.n * sizeof(T)) {}
};

// run executes the launches once for every thread order, from the same outputs,
// and fails where the results differ.
inline void run(Check &c, std::vector<Saved> outputs, const std::function<void()> &launches) {
	std::vector<std::vector<unsigned char>> before, first;
	for (auto &o : outputs) before.emplace_back(static_cast<unsigned char *>(o.p), static_cast<unsigned char *>(o.p) + o.bytes);
	for (emu::Order order : {emu::kForward, emu::kReverse, emu::kShuffled}) {
		emu::order = order;
		for (size_t i = 0; i < outputs.size(); i++)
			if (outputs[i].bytes) memcpy(outputs[i].p, before[i].data(), outputs[i].bytes);
		launches();
		for (size_t i = 0; i < outputs.size(); i++) {
			if (order == emu::kForward) {
				first.emplace_back(static_cast<unsigned char *>(outputs[i].p), static_cast<unsigned char *>(outputs[i].p) + outputs[i].bytes);
			} else if (outputs[i].bytes && memcmp(outputs[i].p, first[i].data(), outputs[i].bytes)) {
				c.fail("output " + std::to_string(i) + " depends on the order of threads");
			}
		}
	}
	emu::order = emu::kForward;
}

inline emu::dim3 d3(unsigned x, unsigned y = 1) { return {x, y, 1}; }
inline unsigned up(i64 n, i64 by) { return unsigned((n + by - 1) / by); }
inline int clamp(int x, int lo, int hi) { return x < lo ? lo : x > hi ? hi : x; }

template <class T>
std::vector<T> normals(Check &c, size_t n, double std = 1) {
	std::vector<T> x(n);
	for (auto &v : x) v = narrow<T>(c.normal() * std);
	return x;
}
template <class T>
std::vector<double> wide(const std::vector<T> &x) {
	std::vector<double> y(x.size());
	for (size_t i = 0; i < x.size(); i++) y[i] = widen(x[i]);
	return y;
}

const bf16 kNaN = 0x7fc0;

// Tests register themselves.
struct Test {
	const char *name;
	void (*f)(Check &);
	static std::vector<Test> &all() {
		static std::vector<Test> v;
		return v;
	}
	Test(const char *n, void (*g)(Check &)) : name(n), f(g) { all().push_back(*this); }
};
#define TEST(name)                    \
	static void test_##name(Check &c);  \
	static Test reg_##name(#name, test_##name); \
	static void test_##name(Check &c)
