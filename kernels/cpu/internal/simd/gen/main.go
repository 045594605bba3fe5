package main

import (
	"flag"
	"log"

	. "github.com/mmcloughlin/avo/build"
)

func main() {
	part := flag.String("part", "", "gemm, vector, or other (stubs for other architectures)")
	dir := flag.String("dir", ".", "folder of package simd, for -part other")
	flag.Parse()
	switch *part {
	case "gemm":
		genGemm()
		genPack()
	case "vector":
		genVector()
	case "other":
		if err := writeOther(*dir); err != nil {
			log.Fatal(err)
		}
		return
	default:
		log.Fatalf("unknown part %q", *part)
	}
	Generate()
}
