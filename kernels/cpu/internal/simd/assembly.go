package simd

//go:generate sh -c "cd gen && go build -o ../simdgen.tmp ."
//go:generate ./simdgen.tmp -part gemm -out gemm_amd64.s -stubs gemm_stub_amd64.go -pkg simd
//go:generate ./simdgen.tmp -part vector -out vector_amd64.s -stubs vector_stub_amd64.go -pkg simd
//go:generate ./simdgen.tmp -part other
//go:generate rm simdgen.tmp
