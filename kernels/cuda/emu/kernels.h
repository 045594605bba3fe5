// Declarations of the kernels, as KERNELS.md lists them. Every .cu is compiled with
// this file before it, so that a signature that differs does not compile.
#pragma once
typedef unsigned short bf16;
typedef unsigned char u8;
typedef unsigned long long u64;
typedef long long i64;

extern "C" {
void gather_rows_bf16(bf16 *out, const bf16 *table, const int *index, int n, int d, int rows, int *bad);
void gather_rows_f32(float *out, const float *table, const int *index, int n, int d, int rows, int *bad);
void scatter_add_bf16(bf16 *dst, const bf16 *src, const int *dstRow, const int *start, const int *srcRow, int buckets, int d, int dstRows, int srcRows, int accumulate, int *bad);
void scatter_add_f32(float *dst, const bf16 *src, const int *dstRow, const int *start, const int *srcRow, int buckets, int d, int dstRows, int srcRows, int accumulate, int *bad);
void bias_backward_partial(float *part, const bf16 *dy, int m, int n, int parts);
void reduce_partials_f32(float *out, const float *part, int parts, int n, int stride, int accumulate);
void reduce_partials_bf16(bf16 *out, const float *part, int parts, int n, int stride, int accumulate);

void gemm_simple(void *c, const bf16 *a, const bf16 *b, const bf16 *bias, int m, int n, int k, i64 lda, i64 ldb, i64 ldc, int transA, int transB, int float32C, int accumulate);

void cast_f32_bf16(bf16 *dst, const float *src, i64 n);
void cast_bf16_f32(float *dst, const bf16 *src, i64 n);
void split_master(bf16 *p, short *rem, const float *src, i64 n);
void join_master(float *dst, const bf16 *p, const short *rem, i64 n);
void lerp_bf16(bf16 *dst, const bf16 *src, float alpha, i64 n);
void lerp_f32(float *dst, const float *src, float alpha, i64 n);
void copy_bytes(u8 *dst, const u8 *src, i64 bytes);
void zero_bytes(u8 *dst, i64 bytes);
void first_not_finite_bf16(u64 *first, const bf16 *x, i64 n);
void first_not_finite_f32(u64 *first, const float *x, i64 n);

void rmsnorm_bf16(bf16 *out, float *rstd, const bf16 *x, const bf16 *add, bf16 *sum, const bf16 *w, int t, int d, float eps);
void rmsnorm_backward_bf16(bf16 *dx, float *part, const bf16 *dy, const bf16 *x, const bf16 *w, const float *rstd, int t, int d, int addTo);
void rope_bf16(bf16 *out, const bf16 *in, const int *pos, const double *turns, const bf16 *qw, const bf16 *kw, float *rstd, int t, int h, int kv, int hd, float eps);
void rope_backward_bf16(bf16 *d, const bf16 *in, const int *pos, const double *turns, const bf16 *qw, const bf16 *kw, const float *rstd, float *part, int t, int h, int kv, int hd, int parts);
void swiglu_bf16(bf16 *out, const bf16 *gu, int t, int f);
void swiglu_backward_bf16(bf16 *dgu, const bf16 *dout, const bf16 *gu, int t, int f);

#define FORWARD bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *pk, const bf16 *pv, int qStride, int kStride, int vStride, int pkStride, int pvStride, \
	const int *items, float *partO, float *partML, int partRows, int h, int kv, float scale
void attention_forward_64(FORWARD);
void attention_forward_128(FORWARD);
void attention_forward_64_wgmma(FORWARD);
void attention_forward_128_wgmma(FORWARD);
void attention_forward_simple(FORWARD, int hd);
#undef FORWARD
void attention_combine(bf16 *out, float *lse, const float *partO, const float *partML, const int *combines, int partRows, int h, int kv, int hd);
void attention_delta(float *delta, const bf16 *dout, const bf16 *out, i64 rows, int hd);
#define DKV bf16 *dqkv, float *part, const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta, const int *works, const int *ranges, const int *tiles, int h, int kv, float scale
void attention_dkv_64(DKV);
void attention_dkv_128(DKV);
void attention_dkv_64_wgmma(DKV);
void attention_dkv_simple(DKV, int hd);
#undef DKV
void attention_dkv_reduce(bf16 *dqkv, const float *part, const int *splits, int h, int kv, int hd);
#define DQ bf16 *dqkv, const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta, const int *tiles, const int *order, int h, int kv, float scale
void attention_dq_64(DQ);
void attention_dq_128(DQ);
void attention_dq_64_wgmma(DQ);
void attention_dq_128_wgmma(DQ);
void attention_dq_simple(DQ, int hd);
#undef DQ

#define HEAD float *logits, i64 ld, int n, int v, const int *target, float scale, float *logp, float *entropy, int mode, const float *old, const float *ref, const float *adv, \
	const float *weight, const float *tis, const float *dlogp, const float *dentropy, int kind, float epsLow, float epsHigh, float delta, float ratioCap, float beta, float entropyCoef, \
	float *loss, int *bad
void head_rows(HEAD);
void head_rows_cluster(HEAD);
#undef HEAD
void sample_rows(int *token, float *logp, float *logits, i64 ld, const float *u, int n, int v, float temperature, float topP);

void sum_squares_partial_bf16(double *part, const bf16 *x, i64 n);
void sum_squares_partial_f32(double *part, const float *x, i64 n);
void sum_squares_finish(float *out, const double *part, int parts);
void clip_coef(float *coef, const float *sumsq, float scale, float maxNorm);
#define SCALARS const float *coef, i64 n, float decay, float beta1, float alpha1, float beta2, float alpha2, float stepSize, float invBias2, float eps
void adamw_bf16_gf32(bf16 *p, short *rem, const float *g, float *m, float *v, SCALARS);
void adamw_bf16_gbf16(bf16 *p, short *rem, const bf16 *g, float *m, float *v, SCALARS);
void adamw_f32_gf32(float *p, const float *g, float *m, float *v, SCALARS);
void adamw_compact_gf32(bf16 *p, short *rem, const float *g, signed char *m, float *scale, bf16 *v, SCALARS, i64 first, int keyA, int keyB);
void adamw_compact_gbf16(bf16 *p, short *rem, const bf16 *g, signed char *m, float *scale, bf16 *v, SCALARS, i64 first, int keyA, int keyB);
#undef SCALARS
void add_gradient(bf16 *dst, const float *src, i64 n, i64 first, int keyA, int keyB);
void group_advantages(double *out, const double *r, const int *start, int groups, int std);
}

// The blocks of a kernel's cluster (__cluster_dims__).
inline unsigned cluster_blocks(const char *kernel) { return __builtin_strcmp(kernel, "head_rows_cluster") ? 1 : 8; }
