package main

func genVector() {}
