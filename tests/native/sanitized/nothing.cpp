// Whether this compiler can build with a sanitizer.
int main() {}
