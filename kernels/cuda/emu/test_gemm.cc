// gemm.cu.
#include "check.h"

#include <array>

// C is kept in rows of ldc >= m elements between columns; what lies between must stay.
template <class T>
static void gemm(Check &c, double u) {
	const bool wide = sizeof(T) == 4;
	for (auto s : {std::array<int, 3>{1, 1, 1}, {3, 5, 0}, {65, 3, 17}, {7, 66, 40}, {130, 70, 33}}) {
		int m = s[0], n = s[1], k = s[2];
		for (int variant = 0; variant < 16; variant++) {
			bool ta = variant & 1, tb = variant & 2, accumulate = variant & 4, biased = !wide && variant & 8;
			i64 lda = (ta ? k : m) + 3, ldb = (tb ? n : k) + 1, ldc = m + 2;
			auto a = normals<bf16>(c, lda * (ta ? m : k) + 1), b = normals<bf16>(c, ldb * (tb ? k : n) + 1), bias = normals<bf16>(c, m);
			auto before = normals<T>(c, ldc * n);
			Buf<bf16> da(a), db(b), dbias(bias);
			Buf<T> out(before);
			run(c, {out}, [&] {
				emu::launch(d3(up(m, 64), up(n, 64)), d3(256), 0,
				            [&] { gemm_simple(out.p, da, db, biased ? dbias.p : nullptr, m, n, k, lda, ldb, ldc, ta, tb, wide, accumulate); });
			});
			for (int j = 0; j < n; j++) {
				for (int i = 0; i < ldc; i++) {
					i64 at = j * ldc + i;
					if (i >= m) {
						c.equal("between columns", at, widen(out[at]), widen(before[at]));
						continue;
					}
					double sum = accumulate ? widen(before[at]) : 0, mag = std::abs(sum);
					if (biased) sum += widen(bias[i]), mag += std::abs(widen(bias[i]));
					for (int l = 0; l < k; l++) {
						double x = widen(a[ta ? i * lda + l : l * lda + i]) * widen(b[tb ? l * ldb + j : j * ldb + l]);
						sum += x, mag += std::abs(x);
					}
					c.near("c", at, widen(out[at]), sum, (k + 3) * kU32 * mag + u * std::abs(sum));
				}
			}
		}
	}
}
TEST(gemm_simple) {
	gemm<float>(c, 0);
	gemm<bf16>(c, kUBf16);
}
