# Fails if code built with an instruction set's flags defines a symbol outside that set's namespace: the linker may keep any
# copy of a shared inline function, and one built for AVX-512 ends in SIGILL elsewhere.
#   cmake -DNM=nm -DNAMESPACE=avx512 -DOBJECTS=a.o,b.o -P check_symbols.cmake
string(REPLACE "," ";" OBJECTS "${OBJECTS}")
execute_process(COMMAND ${NM} -C --defined-only --extern-only ${OBJECTS} OUTPUT_VARIABLE listing COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]* [A-Za-z] [^\n]+" symbols "${listing}")
set(found 0)
foreach(symbol IN LISTS symbols)
  string(REGEX REPLACE "^[0-9a-f]+ [A-Za-z] " "" name "${symbol}")
  if(NOT name MATCHES "dsmoe::cpu::${NAMESPACE}::")
    message(SEND_ERROR "code built for ${NAMESPACE} defines ${name}")
  endif()
  math(EXPR found "${found} + 1")
endforeach()
if(found EQUAL 0)
  message(SEND_ERROR "no symbols found in ${OBJECTS}")
endif()
message(STATUS "${NAMESPACE}: ${found} symbols, all in its namespace")
